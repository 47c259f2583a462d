// Empty: lets the compiler accept functions whose bodies are in package runtime.
