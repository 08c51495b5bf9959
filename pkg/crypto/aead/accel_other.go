//go:build !amd64 || purego

package aead

import "github.com/missiu/missiu/pkg/crypto/mac"

const (
	haveGCM = false
	haveCBC = false
)

type ownScratch struct{}

func newOwnGCM([]byte, []byte, int) core { panic("aead: no own AES-GCM") } // see haveGCM

func newOwnCBC([]byte, *mac.MAC) core { panic("aead: no own AES-CBC") } // see haveCBC

func newOwnCounter([]byte) counter { panic("aead: no own AES-CTR") } // see haveCBC
