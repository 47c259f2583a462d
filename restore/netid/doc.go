// Package netid knows who a restored VM is on its network: the addresses of its
// cards, and who else answers to them.
//
// A VM that comes up while another has its address takes that one's packets, in
// turns. So before a restore the host is looked at: the command lines of other QEMU
// processes, and what the bridges it will be on have learnt. What is found is a
// warning and no refusal: an address that a bridge has learnt may be the dead VM's
// own, and on networks of their own the same address is no conflict.
//
// The package only reads /proc and /sys, as they are in the caller's network
// namespace, and keeps nothing.
package netid
