// Package policypb is policy.proto in Go, as generated: the messages and the gRPC
// client and server. Authors use package policy. It holds no state of its own.
package policypb
