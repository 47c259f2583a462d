// Command ckagent-policy-fixed is the policy `fixed` as a plugin; ckagent starts it.
package main

import (
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

func main() { policy.Serve(shipped.NewFixed) }
