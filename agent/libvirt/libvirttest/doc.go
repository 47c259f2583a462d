// Package libvirttest plays a libvirt daemon with one domain for tests: the calls
// that package libvirt makes, answered over a socket pair, with an encoding of
// its own, so that a mistake in one is not repeated in the other.
//
// A Daemon owns one goroutine, which ends with the connection; Close joins it.
// Its fields are set before Start and not changed afterwards.
package libvirttest
