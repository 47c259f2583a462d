// Package cmdline treats a QEMU command line as data: it splits the arguments
// into options with or without a value, takes the key=value (or JSON) value of
// an option apart, lets one change it, and puts everything together again such
// that an untouched command line means to QEMU exactly what it meant before.
//
// Which options take a value is a table (table.go) of every x86 option of QEMU
// 7.2 and 10.0, and of older ones since removed; a test holds it against the
// installed binary. An option the table does not know is guessed, marked
// Unknown, and still rendered as it was found, so that a newer QEMU's command
// line survives the round trip.
//
// Everything here is a pure function or a plain value: no I/O, no goroutines, no
// locks; a *KeyVal must not be changed from two goroutines at once. Input is
// hostile by assumption (another process wrote it): sizes and JSON nesting are
// bounded, and failures are plain errors that wrap ErrSyntax.
package cmdline
