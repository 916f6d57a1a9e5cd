"""The API that clients of OpenAI, vLLM and llama-server speak: /v1, /tokenize, /detokenize, /apply-template."""
