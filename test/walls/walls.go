// Package walls holds no code. Its test asserts which packages of this module
// may reach which others, so that a daemon cannot grow into its neighbour.
package walls
