// Package apipb is agent.proto in Go, as generated: the messages and the gRPC client
// and server. It holds no state of its own.
package apipb
