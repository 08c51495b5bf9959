//go:build !purego

package aead

const purego = false
