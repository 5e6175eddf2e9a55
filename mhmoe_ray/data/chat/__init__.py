"""Conversations: their chat template, and those of their tokens that a model learns to predict.

The targets are the tokens of the assistant's turns, with those that end a turn. A server renders prompts with the same
template.

template.py   the chat template: prompts, and the spans of the assistant's turns
process.py    the process that renders by templates of others, with limits of time and memory
encoder.py    the tokens of a rendered conversation, and the mask of its targets
"""
