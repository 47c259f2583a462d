// Package net watches the network of virtual machines at their taps: packets and
// bytes each way, idle slots (no packet either way for a gap), TCP requests that
// wait for an answer, and receive windows that are closed. It sees IPv4 and IPv6
// with options and extension headers, with up to two VLAN tags.
//
// # Words
//
// In and out are the VM's: in goes to it. A request is data to the VM on a
// connection on which none was waiting; it is answered by new data from the VM that
// acknowledges all of it. A window is closed (a stall) below one full segment and
// open again from two. An idle slot begins a gap after the last packet, when the
// timer finds that nothing came; it was a false one if it ended within a gap's
// quarter of being told of.
//
// # Life cycle
//
// Load loads the programs; Attach puts them on one interface (TCX, so that other
// programs there go on), Detach takes them off; Close ends everything. An interface
// that goes away takes its attachment with it. Nothing is pinned.
//
// # Limits
//
// A connection whose opening was not seen has an unknown window scale: only a window
// of zero is a stall then. Fragments after the first count as packets only. Of UDP
// and everything else there are packets and slots, not requests. vhost-user and SR-IOV
// interfaces have no tap and are not seen; neither are user and socket netdevs, for
// which there is package sock.
//
// # Concurrency
//
// Methods may be called from any goroutine; Events has one reader.
package net
