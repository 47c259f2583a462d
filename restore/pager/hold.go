package pager

import (
	"time"

	"golang.org/x/sys/unix"
)

// hold is what keeps a drain from starting (Config.NoDrain). The starter ends it
// when the guest runs; but a starter may be killed after it let the guest run and
// before it said so, or stand still there. So the hold also ends with its starter,
// and, if the Config says so, some time after the first fault. Ended too early, it
// only takes some processor time from the load of the device state.
//
// It belongs to the goroutine of the beater.
type hold struct {
	ctl     *control
	starter int // pidfd; -1 if the hold is over
	after   time.Duration
	faultNS int64 // when a fault was first seen; 0: none yet
}

func newHold(cfg *Config, ctl *control) *hold {
	h := &hold{ctl: ctl, starter: -1, after: cfg.DrainAfter}
	if !cfg.NoDrain || ctl.has(flagRelease) {
		return h
	}
	fd, err := unix.PidfdOpen(cfg.StarterPID, 0)
	if err == nil {
		if (occupant{cfg.StarterPID, cfg.StarterStart}).exists() {
			h.starter = fd
			return h
		}
		unix.Close(fd)
	}
	// Nobody is left who could release it. Without a pidfd (a system short of
	// descriptors) this is the safe side.
	ctl.setFlag(flagRelease)
	return h
}

// look ends a hold that has lasted too long.
func (h *hold) look() {
	switch {
	case h.starter < 0:
	case h.ctl.has(flagRelease):
		h.close()
	case h.after > 0 && h.ctl.faults.Load() > 0:
		now := nowNS()
		if h.faultNS == 0 {
			h.faultNS = now
		}
		if now-h.faultNS >= int64(h.after) {
			h.release()
		}
	}
}

func (h *hold) release() {
	h.ctl.setFlag(flagRelease)
	h.close()
}

func (h *hold) close() {
	if h.starter >= 0 {
		unix.Close(h.starter)
		h.starter = -1
	}
}
