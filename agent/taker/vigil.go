package taker

import (
	"sync"
	"time"
)

// vigil acts when nothing was heard for some time. It counts several shorter times of
// which each has to pass: a process that was frozen finds its timers due, and what it did
// not hear meanwhile is there to be read.
type vigil struct {
	every time.Duration
	act   func()

	mu    sync.Mutex
	timer *time.Timer
	left  int // times that may pass; 0: nothing is expected
	acted bool
	over  bool
}

// watchOver begins with nothing expected.
func watchOver(limit time.Duration, act func()) *vigil {
	v := &vigil{every: limit / lapses, act: act}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.timer = time.AfterFunc(v.every, v.pass)
	return v
}

func (v *vigil) pass() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.over {
		return
	}
	v.timer.Reset(v.every)
	if v.left == 0 {
		return
	}
	if v.left--; v.left == 0 {
		v.acted = true
		v.act()
	}
}

// expect begins the time anew.
func (v *vigil) expect() { v.set(lapses) }

// rest expects nothing until the next expect.
func (v *vigil) rest() { v.set(0) }

func (v *vigil) set(left int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left = left
}

// lapsed reports whether it has acted.
func (v *vigil) lapsed() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.acted
}

// close ends it; it does not act any more.
func (v *vigil) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.over = true
	v.timer.Stop()
}
