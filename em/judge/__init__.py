"""An LLM judge: rubrics, the calls, the answers, what they cost."""
