// Package guest makes the guests that tests, benchmarks and the demo run: a
// self-checking Linux guest, a small multiboot guest for machines whose KVM runs
// no 64-bit kernels, a second QEMU version and a UEFI firmware.
//
// Everything comes from the packages of the machine's own Debian release and
// from the C sources beside this file (embedded in the binary). Nothing is
// installed: packages are fetched with apt-get download, using package lists in
// the cache, and unpacked with dpkg-deb -x. apt's mirrors and keys are those
// the machine is configured with.
//
// # Cache
//
// Artifacts live under CKAGENT_CACHE, or .cache in the root of the module the
// working directory is in, or the user's cache directory. Each artifact is a
// directory named after a hash of everything it is built from (sources, recipe,
// Debian release), built beside its place and renamed into it, so one that
// exists is complete, and a changed source makes another one. Concurrent
// processes are kept apart by flock on a file per artifact: one builds, the
// others wait and use the result. Locks are taken in the order artifact, then
// package, then package lists; a build holds its lock until it is done or its
// context ends.
//
// # Failure
//
// A build that fails leaves nothing behind but downloaded packages. Without a
// network the first build fails with a *problem.Error that names the package;
// later calls need no network. Removing the cache directory is always safe.
package guest
