package aead

import (
	"crypto/fips140"
	"sync/atomic"
)

var standardOnly atomic.Bool

// UseStandardLibrary makes all Ciphers of the future compute AES with crypto/aes
// and crypto/cipher only. A program calls it at its start.
func UseStandardLibrary() { standardOnly.Store(true) }

// Implementation names, for people, what computes AES in Ciphers made now: own
// code where the CPU and the operating system have its instructions, unless
// UseStandardLibrary was called or the process is in FIPS 140-3 mode, in which
// the validated module computes.
func Implementation() string {
	switch {
	case useGCM():
		return "AES-GCM VAES/AVX-512, AES-CBC and counter mode AES-NI x8"
	case useCBC():
		return "AES-GCM standard library, AES-CBC and counter mode AES-NI x8"
	}
	return "standard library"
}

// owned reports whether own code may be used.
func owned() bool { return !standardOnly.Load() && !fips140.Enabled() }

func useGCM() bool { return haveGCM && owned() }
func useCBC() bool { return haveCBC && owned() }
