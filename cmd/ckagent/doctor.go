package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/doctor"
)

// proofs is what is known of the capture in the kernel, in doctor's words.
func proofs(ctx context.Context) (out []doctor.Proof, err error) {
	paths, err := proving.New(nil).All(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range paths {
		out = append(out, doctor.Proof{Accel: p.Accel, RAM: p.RAM, OK: p.Outcome == proving.Proved, Late: p.Outcome == proving.Inconclusive, Detail: p.Detail})
	}
	return out, nil
}

type doctorOptions struct {
	store string
	qemu  []string
}

func newDoctorCommand(a *app) *cobra.Command {
	var o doctorOptions
	c := &cobra.Command{
		Use: "doctor", Short: "Tell what this host offers, what is missing, and how to mend it", Args: exactArgs(0, "no argument"),
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := doctor.Run(c.Context(), doctor.Options{StoreDir: o.store, QEMU: o.qemu, Proofs: proofs})
			if err != nil {
				return err
			}
			if a.json {
				a.print("doctor", r)
				return nil
			}
			return r.WriteText(a.out)
		},
	}
	storeFlag(c, &o.store)
	c.Flags().StringSliceVar(&o.qemu, "qemu", nil, "further QEMU binaries to look at")
	return c
}
