// Package export turns a checkpoint into files that other tools read: a migration
// stream for QEMU, a save image for libvirt, an ELF core for gdb and crash, a flat
// file of guest-physical memory.
//
// Life cycle. Write encodes one checkpoint, from a Reader the caller holds open, to
// an io.Writer, from the first byte to the last: it never seeks, and its memory does
// not follow the size of RAM. A writer that is a Skipper has holes left out of the
// flat file. File is such a writer: a file that appears under its name only when all
// of it is there.
//
// Concurrency. A call of Write is one goroutine and shares nothing with another.
//
// Failure modes. Every page is checked against its checksum as it is read. One that
// does not match ends the export with problem.Integrity; what was written before is
// a beginning without an end, which none of the readers takes for the whole (the
// flat file has no end mark: heed the exit code, or have it written to a File).
// A checkpoint that cannot be put into a format (no domain XML, unknown places of
// memory, a CPU that is not x86-64) is problem.Refused before the first byte.
package export
