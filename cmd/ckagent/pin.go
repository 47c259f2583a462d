package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/store"
)

type pinOptions struct{ store string }

func newPinCommand(a *app) *cobra.Command {
	return pinCommand(a, "pin ID", "Keep a checkpoint whatever retention says", "pinned", (*store.Store).Pin)
}

func newUnpinCommand(a *app) *cobra.Command {
	return pinCommand(a, "unpin ID", "Let retention have a checkpoint again", "unpinned", (*store.Store).Unpin)
}

func pinCommand(a *app, use, short, done string, change func(*store.Store, context.Context, string) error) *cobra.Command {
	var o pinOptions
	c := &cobra.Command{
		Use: use, Short: short, Args: exactArgs(1, "the id of a checkpoint"),
		RunE: func(c *cobra.Command, args []string) error {
			st, err := store.Open(o.store)
			if err != nil {
				return err
			}
			if err := change(st, c.Context(), args[0]); err != nil {
				return err
			}
			if a.json {
				a.print("pin", struct {
					Schema string `json:"schema"`
					ID     string `json:"id"`
					State  string `json:"state"`
				}{schema("pin"), args[0], done})
				return nil
			}
			fmt.Fprintf(a.out, "%s %s\n", done, args[0])
			return nil
		},
	}
	storeFlag(c, &o.store)
	return c
}
