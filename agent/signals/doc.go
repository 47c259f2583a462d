// Package signals is what ckagent knows about a running VM from outside: how fast
// its memory is dirtied and where, when its vCPUs and its network are idle, how much
// it writes to disk. Policies decide by it, people look at it.
//
// # Parts
//
// track finds out which pages are written, estimate makes figures of that, heatmap
// draws it; the programs under bpf count faults, scheduling, packets and disk writes
// in the kernel. This package puts them together for one VM (Memory, Watch) and
// keeps the programs loaded for all (Kernel). Each program loads, fails and works
// alone: what is missing is said, and what is used instead (Kernel.Missing).
//
// # Life cycle
//
// Kernel loads the programs once per process; VMs are attached and detached at run
// time. Everything goes away with the process: programs and maps are pinned nowhere,
// and a userfaultfd ends with its last descriptor.
//
// # Lock order
//
// watched.busy, then the VM's lock (vm.Lock), then its memory; Watcher.mu may be taken
// inside of them and takes nothing itself.
//
// # Failure modes
//
// Memory being tracked by somebody else is problem.Busy; a VM that ends is
// problem.NotFound; a program that cannot be loaded is a note, not an error.
package signals
