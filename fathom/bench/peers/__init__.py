"""The contestants. Each file is loaded by path into a process of its own (`child.py`), in an interpreter that need not
have Fathom; a role that a contestant plays is a class in its file.

    PACKAGES         the names under which its version is looked up
    Trainer(job)     step() -> {seconds, loss, parts}; choose() tries settings
    Decoder(job)     answer(prompts, new) -> {whole, first or each, tokens}; choose(prompt) tries settings
    setting          what it ran with, in words that a person reads

A Trainer's job: {model, tokens (a .npy file of rows), precision, rows, micro_batches, lr, betas, eps, weight_decay,
clip, threads, device}. A Decoder's: {model, weights, window, rows, threads, device}.

A job may have `kept`: the setting that `choose` of an earlier process found.

whole   seconds until all tokens are there
first   seconds until every row has its first token; early: tokens that are there by then, if more than one a row
each    or else, of each row, seconds from its first token to its last
tokens  of each row, or None where the contestant has `tokens(prompt, new)` for them
"""
