// Package vmstate turns the device state that a running QEMU writes
// (xen-save-devices-state) into a migration stream that another QEMU loads
// (migrate-incoming), takes it out of such a stream, lists the sections of either,
// and reads the registers of x86-64 vCPUs.
//
// The two differ at both ends only. After the eight bytes of header a migration
// stream carries a configuration section with the machine type, which the
// loader compares with its own; after the end-of-file mark it carries a
// description of the sections, which the loader reads and drops. Machine types
// up to 2.3 know neither the configuration section nor footers.
//
// Sections have no length on the wire: only the loader's device models know
// where one ends. The walker here finds the ends by their footer (0x7e and the
// section's id, followed by a new section or the end), bounded in sections and
// name lengths. It is a listing for people and for checks, not a proof, unless the
// stream's description names the sections to expect.
//
// Nothing here does I/O or keeps state; every function may be called from any
// goroutine. Input is treated as hostile: no allocation follows a length read
// from it beyond the input's own size. Failures wrap ErrFormat, or ErrTruncated
// (itself an ErrFormat) when the end is missing.
package vmstate
