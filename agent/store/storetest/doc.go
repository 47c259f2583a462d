// Package storetest is what every place a store can live in has to pass, and the
// helpers that make small checkpoints for tests of other packages.
//
// Run takes a file system (fsys.FS) and runs the store's contract on it: a new
// backend is done when it passes.
package storetest
