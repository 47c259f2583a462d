package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/restore"
)

type pageOptions struct{ detach bool }

func newPageCommand(a *app) *cobra.Command {
	var o pageOptions
	c := &cobra.Command{
		Use: "page QEMU-PID|VM", Short: "Take up the paging of a restored VM again",
		Args: exactArgs(1, "the pid or the name of a restored VM"),
		Long: "Take up the paging of a restored VM again, if both processes of its pager died at once or gave\n" +
			"up on a store that was away. The guest's processors that wait for memory go on. It may be\n" +
			"called at any time, and again.",
		RunE: func(c *cobra.Command, args []string) error { return runPage(c, a, o, args[0]) },
	}
	c.Flags().BoolVar(&o.detach, "detach", false, "end when a pager is at work, instead of when everything is in")
	return c
}

func runPage(c *cobra.Command, a *app, o pageOptions, who string) error {
	res, err := restore.Repage(c.Context(), "", who, o.detach)
	if err != nil {
		return err
	}
	switch {
	case a.json:
		a.print("page", res)
	case o.detach:
		fmt.Fprintf(a.out, "VM %s, pid %d: a pager is at work\n", res.VM, res.QEMUPID)
	default:
		fmt.Fprintf(a.out, "VM %s, pid %d: everything in after %s, with %d faults\n",
			res.VM, res.QEMUPID, durationText(time.Duration(res.DrainedNS)), res.Faults)
	}
	return nil
}
