package ikeconf

import (
	"io/fs"
	"strings"
	"syscall"
	"time"
)

// memFiles are files in memory.
type memFiles map[string]memFile

type memFile struct {
	data string
	mode fs.FileMode
	uid  uint32
}

func files(conf, secrets string) memFiles {
	return memFiles{"ike.conf": {conf, 0o644, 0}, "ike.secrets": {secrets, 0o600, 0}}
}

func (m memFiles) UID() int { return 0 }

func (m memFiles) Open(name string) (fs.File, error) {
	f, ok := m[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &openMem{f, strings.NewReader(f.data)}, nil
}

type openMem struct {
	memFile
	*strings.Reader
}

func (f *openMem) Stat() (fs.FileInfo, error) { return f, nil }
func (f *openMem) Close() error               { return nil }
func (f *openMem) Name() string               { return "" }
func (f *openMem) Size() int64                { return int64(len(f.data)) }
func (f *openMem) Mode() fs.FileMode          { return f.mode }
func (f *openMem) ModTime() time.Time         { return time.Time{} }
func (f *openMem) IsDir() bool                { return f.mode.IsDir() }
func (f *openMem) Sys() any                   { return &syscall.Stat_t{Uid: f.uid} }
