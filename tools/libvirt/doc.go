// Package libvirt tests ckagent on domains of a real libvirtd.
//
// It has no code but tests, which run the scripts beside it: story.sh (a domain's
// checkpoint, its crash, and its return to libvirt) and manners.sh (what libvirt can
// still do, and what happens when ckagent or libvirtd ends inside a pause). Both run
// by themselves, too. host.sh brings the libvirtd: in mount, pid and network
// namespaces, with directories and a user of its own.
//
// A script that fails says why on standard error and leaves nothing: the end of its
// pid namespace ends whatever it had started.
package libvirt
