// Package qcow2 reads the header of qcow2 images: how large the disk is and which
// other image lies below. It is for questions that must be answered without starting a
// program and without taking a lock; everything else about images is qemu-img's. It also
// gives an empty image the LUKS header of another one, which qemu-img does only for who
// knows the secret.
//
// Headers are data from outside: what is read is bounded, and fuzzed. Functions may be
// called from any goroutine and start none.
package qcow2
