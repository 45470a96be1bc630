/* A computecore.dll for tests: the same functions, the same ABI, and every call checked.
 *
 * Facts of the interface are those of the public reference (ComputeCore.h, Windows 10 1809).
 * All state is behind one lock. Whatever is in its caller's hands is kept in lists of what is
 * alive, so that a handle is looked for there before it is touched.
 */
#ifndef FAKE_H
#define FAKE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef int32_t HRESULT;
typedef uint16_t WCHAR16;

#define S_OK ((HRESULT)0)
#define E_NOTIMPL ((HRESULT)0x80004001)
#define E_FAIL ((HRESULT)0x80004005)
#define E_INVALIDARG ((HRESULT)0x80070057)
#define WIN_ERROR(code) ((HRESULT)(0x80070000u | (code)))
#define FILE_NOT_FOUND WIN_ERROR(0x02)
#define INVALID_HANDLE WIN_ERROR(0x06)
#define SHARING_VIOLATION WIN_ERROR(0x20)
#define ALREADY_EXISTS WIN_ERROR(0xB7)
#define NOT_FOUND WIN_ERROR(0x490)
#define HCS(code) ((HRESULT)(0x80370000u | (code)))
#define INVALID_JSON HCS(0x10D)
#define SYSTEM_NOT_FOUND HCS(0x10E)
#define ALREADY_STOPPED HCS(0x110)
#define NOT_STARTED HCS(0x115)
#define ALREADY_STARTED HCS(0x116)
#define PENDING HCS(0x117)
#define TIMED_OUT HCS(0x118)

extern pthread_mutex_t lock;

/* text.c: growing UTF-8, UTF-16 in, UTF-16 out, and what was breached. */

typedef struct {
    char *data;
    size_t length, room;
} Text;

void text_add(Text *text, const char *bytes, size_t count);
void text_print(Text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
void text_quoted(Text *text, const char *string);
void text_clear(Text *text);

void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
char *text_in(const WCHAR16 *string, const char *what);
WCHAR16 *text_out(const char *utf8);
int strings_alive(void);
void strings_forget(void);

/* json.c: a document as a tree. */

typedef enum { J_NULL, J_BOOL, J_NUMBER, J_STRING, J_ARRAY, J_OBJECT } Kind;

typedef struct Json {
    Kind kind;
    bool boolean;
    double number;
    char *string;      /* of a string */
    char *name;        /* of a member */
    struct Json *first, *next;
} Json;

Json *json_parse(const char *text);
void json_free(Json *json);
const Json *json_member(const Json *object, const char *name);
const char *json_string(const Json *object, const char *name);

/* vm.c: systems, and what documents do to them. */

typedef struct System System;

System *system_find(const char *id);
bool system_runs(const System *system);
/* The HRESULT, and a ResultError or result document to be freed; NULL if there is none. */
HRESULT system_modify(System *system, const char *document, char **result);
HRESULT system_properties(System *system, const char *query, char **result);
HRESULT systems_enumerate(const char *query, char **result);
HRESULT access_change(bool grant, const WCHAR16 *vm_id, const WCHAR16 *path);
void systems_forget(void);
char *error_document(HRESULT code, const char *message);

/* script.c: what the test wants of the next call of a kind. */

typedef enum { OPEN, CREATE, MODIFY, PROPERTIES, ENUMERATE, GRANT, REVOKE, CALLS } Call;
typedef enum { AT_START, AT_END, UNTIL_TOLD, LATE_WAITS, AFTERWARDS } When;

typedef struct Turn {
    Call call;
    When when;
    HRESULT code;
    char *document;
    int milliseconds;
    struct Turn *next;
} Turn;

Turn *turn_take(Call call);
void turn_free(Turn *turn);
void turns_forget(void);

/* operations.c */

int operations_alive(void);
int systems_open(void);
void operations_forget(void);

extern Text documents; /* what modify was given, one JSON string after another */

#endif
