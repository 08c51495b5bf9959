package aead

// The generator is a module of its own: nothing here depends on it.
//
//go:generate go -C internal/asm run . -unit gcm -out ../../gcm_amd64.s -stubs ../../gcm_stubs_amd64.go -pkg aead
//go:generate go -C internal/asm run . -unit cbc -out ../../cbc_amd64.s -stubs ../../cbc_stubs_amd64.go -pkg aead
