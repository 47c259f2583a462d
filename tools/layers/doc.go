// Package layers holds no code: its test keeps the arrows between the packages
// of this module pointing one way, and every package documented.
package layers
