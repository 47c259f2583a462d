// Package goqemu puts our QMP transport behind the Monitor interface of
// github.com/digitalocean/go-qemu, so that its generated calls (package raw)
// and tools written for it run over a transport that takes replies of any size,
// passes descriptors, and does not stall on events nobody drains.
//
// A Monitor lives from New to Disconnect and may be used from any goroutine.
// Each stream of events has a goroutine of its own that ends with its context
// or the connection; Disconnect joins them. A slow consumer loses the oldest
// events, never the connection. Failures are those of package qmp, unchanged.
package goqemu
