/* Text: UTF-8 inside, UTF-16 that ends in NUL outside, and the list of breaches. */
#include "fake.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32 /* windows.h has other ideas of what an HRESULT is */
__declspec(dllimport) void *__stdcall LocalAlloc(unsigned flags, size_t bytes);
#endif

#define LONGEST (1u << 20) /* of a string that is given to us, in units */

static Text breaches;

void text_add(Text *text, const char *bytes, size_t count) {
    if (text->length + count + 1 > text->room) {
        text->room = 2 * (text->length + count + 1);
        text->data = realloc(text->data, text->room);
    }
    memcpy(text->data + text->length, bytes, count);
    text->length += count;
    text->data[text->length] = '\0';
}

static void text_vprint(Text *text, const char *format, va_list arguments) {
    char line[2048];
    int count = vsnprintf(line, sizeof line, format, arguments);
    text_add(text, line, count < (int)sizeof line ? (size_t)count : sizeof line - 1);
}

void text_print(Text *text, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    text_vprint(text, format, arguments);
    va_end(arguments);
}

void text_quoted(Text *text, const char *string) {
    text_add(text, "\"", 1);
    for (const unsigned char *at = (const unsigned char *)string; *at; at++) {
        if (*at == '"' || *at == '\\')
            text_print(text, "\\%c", *at);
        else if (*at < 0x20)
            text_print(text, "\\u%04x", *at);
        else
            text_add(text, (const char *)at, 1);
    }
    text_add(text, "\"", 1);
}

void text_clear(Text *text) {
    free(text->data);
    *text = (Text){0};
}

void violation(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    text_vprint(&breaches, format, arguments);
    va_end(arguments);
    text_add(&breaches, "\n", 1);
}

/* The text to be freed; NULL, and a violation, if it cannot be one. */
char *text_in(const WCHAR16 *string, const char *what) {
    Text text = {0};
    if (!string || (uintptr_t)string % 2) {
        violation("%s: no pointer to UTF-16: %p", what, (const void *)string);
        return NULL;
    }
    text_add(&text, "", 0);
    for (size_t n = 0; string[n]; n++) {
        uint32_t unit = string[n];
        if (n == LONGEST) {
            violation("%s: no NUL at its end", what);
            text_clear(&text);
            return NULL;
        }
        if (unit >= 0xD800 && unit < 0xDC00 && string[n + 1] >= 0xDC00 && string[n + 1] < 0xE000)
            unit = 0x10000 + ((unit - 0xD800) << 10) + (string[++n] - 0xDC00u);
        char bytes[4];
        size_t count = unit < 0x80 ? 1 : unit < 0x800 ? 2 : unit < 0x10000 ? 3 : 4;
        for (size_t i = count; i-- > 1; unit >>= 6)
            bytes[i] = (char)(0x80 | (unit & 0x3F));
        bytes[0] = (char)(count == 1 ? unit : (0xF00u >> count) | unit);
        text_add(&text, bytes, count);
    }
    return text.data;
}

/* --- What is handed out, and has to come back through LocalFree, once --- */

typedef struct Out {
    void *address;
    bool is_free;
    struct Out *next;
} Out;

static Out *handed_out;

WCHAR16 *text_out(const char *utf8) {
    size_t length = strlen(utf8), units = 0;
    WCHAR16 *made = malloc(2 * (length + 1));
    for (const unsigned char *at = (const unsigned char *)utf8; *at;) {
        int more = *at < 0x80 ? 0 : *at < 0xE0 ? 1 : *at < 0xF0 ? 2 : 3;
        uint32_t point = more == 0 ? *at : *at & (0x3Fu >> more);
        for (at++; more--; at++)
            point = point << 6 | (*at & 0x3F);
        if (point >= 0x10000) {
            made[units++] = (WCHAR16)(0xD800 + ((point - 0x10000) >> 10));
            point = 0xDC00 + ((point - 0x10000) & 0x3FF);
        }
        made[units++] = (WCHAR16)point;
    }
    made[units++] = 0;
    Out *out = malloc(sizeof *out);
#ifdef _WIN32
    out->address = LocalAlloc(0, 2 * units);
#else
    out->address = malloc(2 * units); /* exactly as long: one unit more is not ours to read */
#endif
    memcpy(out->address, made, 2 * units);
    free(made);
    out->is_free = false;
    out->next = handed_out;
    handed_out = out;
    return out->address;
}

int strings_alive(void) {
    int count = 0;
#ifdef _WIN32
    return 0; /* kernel32 frees them, and does not tell */
#endif
    for (Out *out = handed_out; out; out = out->next)
        count += !out->is_free;
    return count;
}

void strings_forget(void) {
    while (handed_out) {
        Out *out = handed_out;
        handed_out = out->next;
#ifndef _WIN32
        if (!out->is_free)
            free(out->address);
#endif
        free(out);
    }
}

#ifndef _WIN32
EXPORT void *LocalFree(void *address) {
    if (!address)
        return NULL;
    pthread_mutex_lock(&lock);
    Out *out = handed_out;
    while (out && out->address != address) /* the latest is first: an address may come again */
        out = out->next;
    if (!out)
        violation("LocalFree: of what was not handed out: %p", address);
    else if (out->is_free)
        violation("LocalFree: a second time");
    else {
        out->is_free = true;
        free(address);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

EXPORT void CoTaskMemFree(void *address) {
    pthread_mutex_lock(&lock);
    violation("CoTaskMemFree: the wrong function for %p", address);
    pthread_mutex_unlock(&lock);
}
#endif

/* --- For the test --- */

/* A copy of a text, for whoever calls fake_free. */
static char *copy(const Text *text) {
    char *made = malloc(text->length + 1);
    memcpy(made, text->data ? text->data : "", text->length + 1);
    return made;
}

EXPORT char *fake_violations(void) {
    pthread_mutex_lock(&lock);
    char *made = copy(&breaches);
    text_clear(&breaches);
    pthread_mutex_unlock(&lock);
    return made;
}

EXPORT char *fake_documents(void) {
    pthread_mutex_lock(&lock);
    char *made = copy(&documents);
    pthread_mutex_unlock(&lock);
    return made;
}

EXPORT void fake_free(char *text) { free(text); }

/* Proves that whoever watches the memory sees what is wrong with it. */
EXPORT int fake_misbehave(void) {
    volatile WCHAR16 *string = text_out("x");
    return string[2];
}
