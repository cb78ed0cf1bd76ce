"""The champion over HTTP: OpenAI-compatible routes and a chat page on Ray Serve."""
