//go:build !amd64 || purego

package packet

const haveVectors = false

func addAVX2(*byte, int) uint64 { panic("packet: no vectors") } // see haveVectors

func copyAddAVX2(_, _ *byte, _ int) uint64 { panic("packet: no vectors") }
