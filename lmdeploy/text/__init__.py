"""Text <-> token ids: tokenizers, incremental detokenizing, stop words, chat templates. Knows neither torch nor the engine."""
