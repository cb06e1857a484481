"""HTTP: OpenAI's completions with drafts, a page that shows text forming, metrics. Needs the extra ``[serve]``."""
