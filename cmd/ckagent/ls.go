package main

import (
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

type lsOptions struct{ store string }

func newLsCommand(a *app) *cobra.Command {
	var o lsOptions
	c := &cobra.Command{
		Use: "ls", Short: "List the checkpoints in a store", Args: exactArgs(0, "no argument"),
		RunE: func(c *cobra.Command, _ []string) error { return runLs(c, a, o) },
	}
	storeFlag(c, &o.store)
	return c
}

func runLs(c *cobra.Command, a *app, o lsOptions) error {
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	list, err := st.List(c.Context())
	if err != nil && !problem.Is(err, problem.NotFound) { // an empty store is no error
		return err
	}
	views := make([]checkpointView, 0, len(list))
	for _, i := range list {
		views = append(views, viewOf(i))
	}
	if a.json {
		a.print("list", struct {
			Schema      string           `json:"schema"`
			Checkpoints []checkpointView `json:"checkpoints"`
		}{schema("ls"), views})
		return nil
	}
	rows := make([][]string, 0, len(views))
	for _, v := range views {
		var notes []string
		if v.Pinned {
			notes = append(notes, "pinned")
		}
		if v.Depth > 0 {
			notes = append(notes, "continues "+v.Parent)
		}
		if v.Leased {
			notes = append(notes, "in use")
		}
		if v.Damage != "" {
			notes = append(notes, "DAMAGED")
		}
		rows = append(rows, []string{v.ID, v.VM, v.CreatedAt.Local().Format(time.DateTime), dash(v.Mode),
			sizeText(v.RAMBytes), sizeText(v.StoredBytes), durationText(time.Duration(v.PauseNS)), strings.Join(notes, ", ")})
	}
	a.table([]string{"ID", "VM", "TAKEN", "MODE", "RAM", "STORED", "PAUSE", ""}, rows)
	return nil
}
