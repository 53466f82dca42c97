"""The host's side: the program that draws holds a session with its workers and runs steps over them."""
