// Package plan works out how a checkpointed VM is started again: from the
// recorded command line it makes the one that waits for an incoming device
// state with guest memory that holds nothing yet.
//
// Build is a pure function of what was recorded and what the operator asked
// for: it starts nothing and touches nothing. What has to be looked at on the
// host (files that must exist, sockets that must be free, image locks) it lists
// in the Plan, for package restore to check. The steps, in order:
//
//	inline -readconfig, remove what an earlier restore added   (build.go)
//	ask again for redacted secrets                             (secrets.go)
//	--map                                                      (mapping.go)
//	what only served libvirt                                   (libvirt.go)
//	disks of the checkpoint                                    (disks.go)
//	pin machine type and accelerator                           (machine.go)
//	memory backends that start out empty                       (memory.go)
//	consoles, monitors, displays; inherited descriptors        (endpoints.go)
//	networks; a clone gets none unless mapped                  (network.go)
//	other disks and firmware                                   (storage.go)
//	the operator's own arguments, then -S -incoming defer and our monitor
//
// Everything changed is written down in Plan.Changes with its reason; what
// cannot be rebuilt is a *problem.Error (Refused, with what to map). Recorded
// command lines are data from outside: nothing here evaluates them, and only
// package cmdline takes them apart. There are no goroutines and no shared state.
package plan
