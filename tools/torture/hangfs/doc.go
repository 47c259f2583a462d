// Package hangfs is a FUSE file system for tests: it passes everything to a
// directory until it is told, or a number of operations has passed, and then
// stops answering, answers "no space", or answers slowly.
//
// # Life cycle
//
// Mount returns when the file system is there. Close lets operations that hang
// go on (with an I/O error), aborts the connection and unmounts.
//
// # Concurrency
//
// Operations are counted and held in the goroutines of the FUSE server; those
// that hang are released by Close.
package hangfs
