// Package api is how commands talk to whoever protects VMs: an `attach` in the
// foreground, and the daemon. agent.proto is the service; apipb is it in Go.
//
// Life cycle. Listen makes a unix socket that only root can open, Dial connects to
// one, Sockets lists those of running attaches. An attach's socket is named by the
// process's pid and start time, so that one that was left behind is known as such and
// removed.
//
// Failure modes. Errors cross the socket as a gRPC status with a Problem as its
// detail, so that a command ends with the same code and hint as if it had done the
// work itself. A socket nobody answers on is problem.NoDaemon. Text that is not UTF-8, as of a
// path or a program, crosses it as question marks.
package api
