"""State of the context tower per request: slots of Mamba state, pages of keys and values, lengths."""

from twotower_spec.state.block_context import BlockContext
from twotower_spec.state.context_state import ContextState, Extension
from twotower_spec.state.source import ContextSource

__all__ = ["BlockContext", "ContextSource", "ContextState", "Extension"]
