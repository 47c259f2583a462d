package vm

import (
	"context"
	"fmt"
)

// Migration is what QEMU says about the last or current migration. Two equal
// values with Idle between which the machine was watched say that there was none;
// the times tell one that has ended from another.
type Migration struct {
	Status      string `json:"status"`     // "" if there never was one
	TotalMS     int64  `json:"total-time"` // only of one that runs or has completed
	DowntimeMS  int64  `json:"downtime"`   // only of one that has completed
	SetupMS     int64  `json:"setup-time"` // only of one that runs or has completed
	Description string `json:"error-desc"` // of one that has failed
}

// migrationIdle are the states of a migration that is not under way.
var migrationIdle = map[string]bool{"": true, "none": true, "completed": true, "failed": true, "cancelled": true}

// Idle reports whether no migration is under way. States that are not known count
// as under way: setup, active, device, cancelling, pre-switchover, colo, ...
func (m Migration) Idle() bool { return migrationIdle[m.Status] }

// Migration asks for the state of the last or current migration.
func (t *Target) Migration(ctx context.Context) (Migration, error) {
	var m Migration
	if err := t.QMP.Execute(ctx, "query-migrate", nil, &m); err != nil {
		return Migration{}, fmt.Errorf("query-migrate: %w", err)
	}
	return m, nil
}
