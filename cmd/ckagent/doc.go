// Command ckagent checkpoints running QEMU virtual machines and restores them.
//
// Each verb is one file: newXCommand declares its flags, xOptions holds them,
// runX does the work by calling the packages below. Nothing is decided here that
// a package could decide; nothing imports this package.
//
// Helper processes (fault server, guardian, pager) are this same binary with a
// verb that starts with two underscores; they are dispatched before the command
// line is parsed and do not appear in the help.
package main
