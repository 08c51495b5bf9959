//go:build !purego

package aead

import (
	"testing"
	"unsafe"
)

// The assembly knows these offsets; see the constants of the generator.
func TestLayout(t *testing.T) {
	var g gcm
	var l cbcLane
	for _, tt := range []struct {
		what      string
		got, want uintptr
	}{
		{"gcm.powers", unsafe.Offsetof(g.powers), 0},
		{"gcm.round", unsafe.Offsetof(g.round), 256},
		{"gcm.rounds", unsafe.Offsetof(g.rounds), 496},
		{"gcm.salt", unsafe.Offsetof(g.salt), 504},
		{"gcm.tagLen", unsafe.Offsetof(g.tagLen), 508},
		{"gcm", unsafe.Sizeof(g), 512},
		{"cbcLane.src", unsafe.Offsetof(l.src), 0},
		{"cbcLane.dst", unsafe.Offsetof(l.dst), 8},
		{"cbcLane.iv", unsafe.Offsetof(l.iv), 16},
		{"cbcLane", unsafe.Sizeof(l), 24},
	} {
		if tt.got != tt.want {
			t.Errorf("%s at or of %d octets, want %d", tt.what, tt.got, tt.want)
		}
	}
}
