package torture

import "sync"

// own are the pids that this process started itself and waits for by other
// means: QEMU and the agents. The others below it are orphans.
type own struct {
	mu   sync.Mutex
	pids map[int]bool
}

var mine = own{pids: map[int]bool{}}

func (o *own) add(pid int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pids[pid] = true
}

func (o *own) drop(pid int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.pids, pid)
}

func (o *own) has(pid int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.pids[pid]
}
