// Package sock counts what processes send and receive by IP sockets. It stands in
// for package net where a virtual machine has no tap: with user, socket, stream and
// dgram netdevs QEMU itself is the guest's way to the network.
//
// # What it is not
//
// There are calls and bytes of payload, no packets, requests or windows; monitors,
// displays and migrations over TCP are counted along, and what goes over UNIX sockets
// is not. Whoever reports it says that it is an estimate.
//
// # Life cycle
//
// As in package net: Load, Attach, Read, Detach, Close; nothing is pinned. A transfer
// of a process nobody asked about costs one hash lookup.
//
// # Concurrency
//
// Methods may be called from any goroutine.
package sock
