// Package memfs is a file system in memory that behaves like a directory tree on
// disk: the same errors with the same errno, files that stay readable while open
// after their name is gone. Tests run the store on it, and the crash model
// (package crashfs) rebuilds the states a power loss could leave in it.
//
// All methods are safe for concurrent use under one lock; nothing is ever durable.
package memfs
