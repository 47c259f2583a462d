// Package ramstream writes and reads the RAM part of QEMU's migration stream
// (version 3, section "ram" version 4), so that a checkpoint can become a file that
// a stock QEMU loads, and such a file a checkpoint.
//
// A stream is: header, configuration, the RAM sections, the devices' sections, an
// end mark, a description. RAM has no length on the wire, but every record in it
// says what it is, so that its end is found by reading it; what follows is the
// device state, which package vmstate understands.
//
// Life cycle. An Encoder is made for one stream and used in order: Begin, then Page
// and Zero in any order, then End. Decode reads one stream from its first byte to
// its last and hands what it finds to a Sink. Neither seeks, and memory does not
// follow the size of RAM; the device state is held as a whole, up to
// image.MaxDeviceStateBytes. Nothing here starts goroutines or keeps locks.
//
// Pages come in QEMU's unit of 4096 bytes. A live migration sends a page again when
// the guest has written it: what comes last counts.
//
// Failure modes. What comes from outside is treated as hostile: every length is
// bounded before memory is allocated for it, and every address checked against the
// block it is in. ErrFormat is a stream that QEMU did not write or that was damaged;
// ErrTruncated (an ErrFormat) one that ends early; ErrUnsupported one that QEMU wrote
// with a capability whose result is not self-contained or not worth decoding: the
// text names it. Errors of the reader, the writer and the Sink are passed on.
package ramstream
