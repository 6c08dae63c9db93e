"""The page: a Gradio client that speaks only HTTP with the API, and draws which experts every token used."""
