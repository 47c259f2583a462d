package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

const defaultStore = "/var/lib/ckagent"

func storeFlag(c *cobra.Command, dir *string) {
	c.Flags().StringVar(dir, "store", defaultStore, "directory that holds the checkpoints")
}

// checkpointView is a checkpoint as lists show it.
type checkpointView struct {
	ID            string    `json:"id"`
	VM            string    `json:"vm"`
	CreatedAt     time.Time `json:"created_at"`
	Mode          string    `json:"mode"`
	Engine        string    `json:"engine"`
	Parent        string    `json:"parent"`
	Depth         int       `json:"depth"`
	RAMBytes      uint64    `json:"ram_bytes"`
	StoredBytes   uint64    `json:"stored_bytes"`
	Inherited     uint64    `json:"inherited_bytes"` // of segments shared with other checkpoints
	Pages         uint64    `json:"pages"`
	ZeroPages     uint64    `json:"zero_pages"`
	CapturedPages uint64    `json:"captured_pages"`
	PauseNS       int64     `json:"pause_ns"`
	Pinned        bool      `json:"pinned"`
	Leased        bool      `json:"leased"`
	Leases        []string  `json:"leases,omitempty"`
	Damage        string    `json:"damage,omitempty"`
}

func viewOf(i store.Info) checkpointView {
	v := checkpointView{ID: i.ID, VM: i.VM, CreatedAt: i.CreatedAt, Mode: i.Mode, Engine: i.Engine, Parent: i.Parent, Depth: i.Depth, Inherited: i.Inherited,
		RAMBytes: i.RAMBytes, StoredBytes: i.StoredBytes, Pages: i.Pages, ZeroPages: i.ZeroPages,
		CapturedPages: i.CapturedPages, PauseNS: i.PauseNS, Pinned: i.Pinned, Leased: i.Leased()}
	for _, l := range i.Leases {
		v.Leases = append(v.Leases, l.String())
	}
	if i.Damage != nil {
		v.Damage = i.Damage.Error()
	}
	return v
}

// dash is what a table shows for "nothing".
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// notDamaged turns damage that a listing only mentions into an error.
func notDamaged(i store.Info) error {
	if i.Damage == nil {
		return nil
	}
	return problem.New(problem.Integrity, "read checkpoint", i.ID, "%w", i.Damage)
}
