package wire

import (
	"fmt"
	"sync"
)

// Fallback says that a fast path cannot be used and what serves instead.
type Fallback struct {
	Path string // "UDP_SEGMENT"
	To   string // "single datagrams"
	Err  error  // why
}

func (f Fallback) String() string { return fmt.Sprintf("%s: %v; using %s", f.Path, f.Err, f.To) }

// fallbacks tells of each path once.
type fallbacks struct {
	mu   sync.Mutex
	told map[string]bool
	news chan Fallback
}

// maxFallbacks is more than there are paths.
const maxFallbacks = 16

// Fallbacks delivers, once for each path, that it was given up.
func (w *Wire) Fallbacks() <-chan Fallback { return w.fallbacks.news }

func (w *Wire) fellBack(path, to string, err error) {
	f := &w.fallbacks
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.told[path] {
		return
	}
	f.told[path] = true
	select {
	case f.news <- Fallback{path, to, err}:
	default:
	}
}
