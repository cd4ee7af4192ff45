"""Tokenizers, chat templates, conversations and replies: what training, evaluation, export and chat share."""
